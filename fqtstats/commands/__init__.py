"""Commands of the command line, registered in :mod:`fqtstats.cli`, and what commands share."""
