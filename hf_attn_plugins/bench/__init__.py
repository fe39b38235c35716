"""Measuring tools for the commands: timing, hardware, peak memory. They import no command and no method."""
