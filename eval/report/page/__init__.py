"""report.html: its page, tables, samples, style and script."""
