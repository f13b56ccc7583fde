"""Other formats: importers and an exporter. Nothing that reads a store imports this package.

Rules of all importers: files are tasks on Dask; a stopped import resumes with the missing ones, and the result is
byte for byte the same. Invalid rows (a non-finite reward, an action outside the game's set) are left out and listed in
`import.json` next to the game's data; a file with more than 1% of them stops the import with a
description of its actions, and ``--actions full`` maps logs that index all 18 joystick positions, by name. A damaged
file stops the import with its name, row and remedy; ``--skip-bad`` leaves it out and lists it. DQN-Replay's files are
joined: the last row of a dump is the one missing before the next dump's first, so fifty files are one unbroken
sequence. A missing file is a gap, never a false transition. A recording's manifest states the known rules.
"""
