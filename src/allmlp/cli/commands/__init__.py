"""One module per command of ``mixer``; each has ``run(args)``. They do not import each other."""
