"""Measuring tools: timing, hardware, peak memory. They know no command and no method."""
