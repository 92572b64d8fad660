"""Backups of volumes: ordinary pax tars with a manifest of every entry's content and attributes.

    entry       one file, directory ... with all its attributes
    walk        the entries of a directory tree, in archive order
    content     a file's content as of one moment, or read again while it changes
    headers     an entry as tar headers, and back
    tar         entries as the members of a tar
    manifest    a line for every entry, compared while reading
    base        what an incremental archive omits
    write       one pass over a tree, into an archive or only a manifest
    compress    zstd and gzip streams
    stream      the bytes of a tar
    read        an archive as entries, fully checked
    foreign     the entries of tars that other programs wrote
    extract     entries into a directory, never outside it

Members of the volume are named `./...`. The first member is `.unionfs-backup/info.json`; the last ones are
`.unionfs-backup/deleted` (in an incremental archive) and `.unionfs-backup/manifest`.
"""
