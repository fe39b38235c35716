"""What everything stands on: partial results and their merge, masks, rectangles, the base of options."""
