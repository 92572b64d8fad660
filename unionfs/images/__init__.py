"""OCI layers and images.

    rules       what an archive of strangers may contain
    measured    streams that count, limit and hash what passes through
    unpack      a layer's tar as a directory in the kernel's format
    indexed     the copies that an index keeps for hard links
    pack        layers in the kernel's format as a layer's tar
    blobs       layers as compressed files with their digests
    layers      single layers: exported, imported, squashed
    documents   the JSON of images, checked
    tarfiles    an image's archive, whose files are read by name
    sources     images in archives and directories
    locks       locks of the store
    store       unpacked layers and images, shared between mounts
    using       an image as the lowers of a mount
    layout      writing an image as an OCI archive
    committing  a mount as an image
"""
