"""A simulated robot at a table, which needs no display and no graphics library."""

import os

import gymnasium


# Debian's packages with the libraries of MuJoCo's renderer, by what MUJOCO_GL calls it.
GRAPHICS_PACKAGES = {"osmesa": "libosmesa6", "egl": "libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri"}

try:
    import mujoco  # noqa: F401
except (AttributeError, ImportError, OSError) as error:
    # MuJoCo opens the library that MUJOCO_GL names as it is imported, and says nothing of it where it is missing.
    asked = os.environ.get("MUJOCO_GL")
    if asked not in GRAPHICS_PACKAGES:
        raise
    raise ImportError(
        f"MUJOCO_GL={asked}, and its library cannot be opened ({error}). On Debian: apt-get install "
        f"{GRAPHICS_PACKAGES[asked]}; or leave MUJOCO_GL unset and use the renderer 'raycast', which needs no library."
    ) from error

# Gymnasium's convention: `gymnasium.make("tabletop:Tabletop-v0")` imports this module to find the environment.
gymnasium.register(id="Tabletop-v0", entry_point="tabletop.environment:TabletopEnv")
