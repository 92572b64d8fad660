"""Backups of volumes: ordinary pax tars that carry a manifest of every entry's content and attributes.

    entry       one file, directory ... with all its attributes
    walk        the entries of a directory tree, in the order of an archive
    headers     an entry as tar headers, and back
    compress    zstd and gzip streams
    manifest    a line for every entry, compared while reading
    write       a tree into an archive
    read        an archive as entries, everything checked
    extract     entries into a directory, never outside it

The members of the volume are named `./...`. Besides there are `.unionfs-backup/info.json` as the first
member, and as the last `.unionfs-backup/deleted` (in an incremental archive) and `.unionfs-backup/manifest`.
"""
