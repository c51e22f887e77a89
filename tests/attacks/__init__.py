"""Attacks on Garrison, one test each. The first line of a test's docstring is the attack in plain words.

Each test asserts three things: the refusal's stable code; an audit entry or a counted refusal, where the design
promises one; and that nothing else changed on disk or in state (``Standing``: a digest before and after).

Who is attacked:

- ``target.Target``: a whole board. Its owner, store, journal, trust in the registry, and downloads are the real ones;
  the broker, the workers, and the clock are the test's. The registry is ``tests.fakes.tuf_repository``, whose keys the
  test may "steal".
- ``tests.unit.rollouts.fleet.Fleet``: a controller's database and the way of a message into it.
- ``site.Site``: a real Mosquitto with the configuration that ``garrison`` writes, and clients with real certificates.
- Real workers, keys, and sockets, where the attack is on the board itself.

docs/security.md, "Attacks", names each test here once; ``test_table.py`` compares both ways. Add a row with the test.
"""
