"""What we add to the WSGI environment of a request."""

WAITED = "replica_plugin.waited"
"""For how many seconds the request waited for its slot; a float.

gunicorn's access log shows it with `%({replica_plugin.waited}e)s`.
"""
