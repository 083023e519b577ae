"""Writers to other runtimes, one file ``to_<format>.py`` a format, and what they share.

Not here: readers of those files (`ptq.inspect`), when a run exports (`ptq.run`).
"""
