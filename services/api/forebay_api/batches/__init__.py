"""Batches as they run: their lines are read, admitted as requests of class flex, and written into the output files."""
