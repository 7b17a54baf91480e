"""Pictures: images.py has a function for each, panels.py a plot with its axes, canvas.py the marks on Matplotlib's
renderers."""
