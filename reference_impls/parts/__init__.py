"""Parts of one method each, named for it: what would make its module long and means something on its own.

A part that a second method needs becomes a shared module, `_<what it is>.py` beside the methods.
"""
