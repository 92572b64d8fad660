"""`python -m unionfs` is the command `unionfs`."""

from unionfs.cli.main import main

if __name__ == "__main__":
    main()
