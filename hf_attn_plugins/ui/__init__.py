"""What people see: the parser of the command line, suggestions for typos, progress bars, tables as text and HTML."""
