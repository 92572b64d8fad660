"""Backups of volumes: ordinary pax tars with a manifest of every entry's content and attributes.

    entry       one file, directory ... with all its attributes
    walk        the entries of a directory tree, in the order of an archive
    content     a file's content as of one moment, or read again while it changes
    headers     an entry as tar headers, and back
    tar         entries as the members of a tar
    manifest    a line for every entry, compared while reading
    base        what an incremental archive leaves out
    write       one pass over a tree, into an archive or a manifest alone
    compress    zstd and gzip streams
    read        an archive as entries, everything checked
    extract     entries into a directory, never outside it

The members of the volume are named `./...`. The first member is `.unionfs-backup/info.json`, the last ones
are `.unionfs-backup/deleted` (in an incremental archive) and `.unionfs-backup/manifest`.
"""
