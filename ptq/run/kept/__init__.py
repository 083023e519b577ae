"""What runs leave behind for later ones: finished blocks of an interrupted run, and who a finished one was.

Not here: results that other recipes share (`ptq.files.store`).
"""
