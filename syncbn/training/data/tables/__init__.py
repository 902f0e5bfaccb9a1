"""Data sets that a table lists: its file, its targets, how its rows are divided into splits (`data=table`)."""
