"""One file per benchmark: its key and fields, its command, how it measures, its section of the report."""
