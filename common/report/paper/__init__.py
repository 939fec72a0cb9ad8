"""A table or figure of a paper from the runs of its sweep: numbers, verdicts, tables, figures."""
