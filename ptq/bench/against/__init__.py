"""Other runtimes on the same model, threads and tokens: one thin file each, with `NEEDS`, `INSTALL` and `side`."""
