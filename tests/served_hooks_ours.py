"""The same hooks with ours beside them."""

from served_hooks import post_request, pre_request  # noqa: F401

from replica_plugin.conf import *  # noqa: F403
