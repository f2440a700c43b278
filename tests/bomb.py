"""A pickle that does something when it is loaded."""

import os


class Bomb:
    """Makes a folder at `path`: the mark that code of a stranger ran."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
