"""The configuration: from files and environment to `Settings`, or to all that is wrong.

load.py is the way in; settings.py has the keys, each with its kind and its meaning.
"""
