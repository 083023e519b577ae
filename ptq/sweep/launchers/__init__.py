"""Who runs the points of a sweep, and where: one thin file a launcher, over the library that does the work."""
