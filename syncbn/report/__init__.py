"""The report of runs as one HTML file, out of the files of their directories; no torch."""
