"""``python -m fqtstats``: the command line where no script is installed, or of a certain interpreter."""

from fqtstats.cli import main

if __name__ == "__main__":
    main()
