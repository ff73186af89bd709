"""Chaos: everything that can happen to a replica, at random, with a ledger of every request.

The command is `python tests/chaos`; docs/howto/chaos.md has more.

    run.py      one run: a server, a crowd of clients, faults, and the verdict
    clients.py  what clients do: well-behaved, slow, silent, gone
    faults.py   what happens to the server: kills, reloads, resizes, stuck and fatal requests
    endings.py  how the server ends: a stop, a quick one, its master's death, an upgrade
    app.py      the app, which notes what it runs, and checks cap and bound at each request
    ledger.py   every request, and what became of it
    rules.py    when that is right, as a table
    checks.py   what must be so of the server itself: deaths, descriptors, threads, memory
    network.py  a network of our own, in which connections can be cut
"""
