"""A simulated robot at a table, which needs no display and no graphics library."""

import gymnasium


# Gymnasium's convention: `gymnasium.make("tabletop:Tabletop-v0")` imports this module to find the environment.
gymnasium.register(id="Tabletop-v0", entry_point="tabletop.environment:TabletopEnv")
