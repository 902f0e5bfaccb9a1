"""HTML report of one or several runs, made from the files in their run directories; does not import torch."""
