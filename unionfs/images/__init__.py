"""OCI layers and images.

    rules       what an archive of strangers may contain
    measured    streams that count, limit and hash what passes through
    unpack      a layer's tar as a directory in the kernel's format
    pack        layers in the kernel's format as a layer's tar
    blobs       layers as compressed files with their digests
    documents   the JSON of images, checked
    tarfiles    an archive of an image, by names
    sources     images in archives and directories
    layout      writing an image as an OCI archive
    store       unpacked layers and images, shared between mounts
    committing  a mount as an image
    starting    what a container takes from an image's configuration
"""
