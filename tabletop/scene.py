"""What stands on the table: objects, the bowl, and the MuJoCo model around them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np

from .control import REACH_HIGH, REACH_LOW, REACH_RADIUS, rotation_from_vector


COLORS = {
    "red": (0.85, 0.10, 0.10),
    "green": (0.10, 0.62, 0.16),
    "blue": (0.12, 0.25, 0.88),
    "yellow": (0.95, 0.83, 0.10),
    "purple": (0.52, 0.16, 0.66),
    "orange": (0.96, 0.48, 0.06),
}

# Half sizes in metres: MuJoCo's convention for each type of geometry. A brick is too long for the gripper (0.08 m)
# one way round, so that the hand has to turn.
SHAPES = {
    "cube": (mujoco.mjtGeom.mjGEOM_BOX, (0.022, 0.022, 0.022)),
    "brick": (mujoco.mjtGeom.mjGEOM_BOX, (0.050, 0.018, 0.020)),
    "cylinder": (mujoco.mjtGeom.mjGEOM_CYLINDER, (0.022, 0.026, 0.0)),
    "ball": (mujoco.mjtGeom.mjGEOM_SPHERE, (0.023, 0.0, 0.0)),
}

# What the policy of this repository has not been taught to handle, and is to learn from a few demonstrations.
HELD_OUT = ("purple", "ball")

BOWL_RADIUS = 0.065
BOWL_HEIGHT = 0.035
_BOWL_WALLS = 12

# Where objects are laid out, in metres in the robot's base frame: x forward, y to the robot's left, z up from the
# table.
WORKSPACE_LOW = np.array([0.38, -0.22])
WORKSPACE_HIGH = np.array([0.64, 0.22])
CLEARANCE = 0.035
PUSH_ROOM = 0.16  # beside an object that is to be pushed


@dataclass(frozen=True)
class TableObject:
    """
    An object as it lies at the start of an episode.

    Args:
        color, shape (`str`): One of `COLORS` and one of `SHAPES`.
        position (`tuple[float, float]`): x and y in metres.
        yaw (`float`): Turn about the vertical in radians.
    """

    color: str
    shape: str
    position: tuple[float, float]
    yaw: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def rest_height(self) -> float:
        """Height of the centre above the table, in metres."""
        _, size = SHAPES[self.shape]
        return {"ball": size[0], "cylinder": size[1]}.get(self.shape, size[2])


def object_names(objects: Sequence[str] | None = None, hold_out: Sequence[str] = ()) -> list[str]:
    """
    Names of objects, such as `red cube`, in one order whatever is asked for.

    Args:
        objects (`Sequence[str]`, *optional*): Colours, shapes or names of those that are wanted; all by default.
        hold_out (`Sequence[str]`): Colours, shapes or names of those that are not.

    Raises:
        ValueError: If a colour, shape or name is unknown, or nothing is left.
    """
    known = {f"{color} {shape}": {f"{color} {shape}", color, shape} for color in COLORS for shape in SHAPES}
    for argument, given in (("objects", objects or ()), ("hold_out", hold_out)):
        if isinstance(given, str) or set(given) - set().union(*known.values()):
            raise ValueError(
                f"`{argument}` takes a list of colours {list(COLORS)}, shapes {list(SHAPES)} and objects such as "
                f"'red cube'; got {given if isinstance(given, str) else list(given)!r}."
            )
    wanted = set(known) if objects is None else set(objects)
    names = [name for name, words in known.items() if words & wanted and not words & set(hold_out)]
    if not names:
        raise ValueError(f"`objects={objects!r}` without `hold_out={list(hold_out)}` leaves no object to handle.")
    return names


def footprint_radius(shape: str) -> float:
    """Of the circle around an upright object's footprint, in metres."""
    _, size = SHAPES[shape]
    return float(np.hypot(size[0], size[1])) if shape in ("cube", "brick") else size[0]


class _FreeTable:
    """Draws places at which circles do not overlap."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.taken: list[tuple[np.ndarray, float]] = []

    def place(self, radius: float, low: np.ndarray = WORKSPACE_LOW, high: np.ndarray = WORKSPACE_HIGH) -> np.ndarray:
        """Centre (2,) of a free circle, which is taken from now on; NaN where none was found."""
        for _ in range(50):
            point = self.rng.uniform(low, high)
            if all(np.linalg.norm(point - other) > radius + size + CLEARANCE for other, size in self.taken):
                self.taken.append((point, radius))
                return point
        return np.full(2, np.nan)


def lay_out(
    names: list[str], rng: np.random.Generator, push: float = 0.0, tries: int = 200
) -> tuple[list[TableObject], tuple[float, float]]:
    """
    Places for objects and a bowl, apart from each other.

    Args:
        names (`list[str]`): Objects, the target first.
        rng (`np.random.Generator`): Source of places and turns.
        push (`float`, defaults to 0.0): -1 or 1: the target needs room to be pushed that way along y.
        tries (`int`, defaults to 200): Layouts to draw before giving up.

    Returns:
        `tuple`: The objects, and x and y of the bowl.

    Raises:
        ValueError: If they do not fit on the table.
    """
    for _ in range(tries):
        table, objects = _FreeTable(rng), []
        for index, name in enumerate(names):
            color, shape = name.split()
            room = push if index == 0 else 0.0
            low = WORKSPACE_LOW + np.array([0.0, PUSH_ROOM * max(-room, 0.0)])
            high = WORKSPACE_HIGH - np.array([0.0, PUSH_ROOM * max(room, 0.0)])
            point = table.place(footprint_radius(shape), low, high)
            if room:
                path = [(point + np.array([0.0, room * shift]), footprint_radius(shape)) for shift in (0.06, 0.12)]
                table.taken += [*path, (point - np.array([0.0, room * 0.06]), 0.02)]
            yaw = float(rng.uniform(-np.pi / 2, np.pi / 2))
            objects.append(TableObject(color, shape, (float(point[0]), float(point[1])), yaw))
        bowl = table.place(BOWL_RADIUS)
        if np.isfinite([*bowl, *(value for item in objects for value in item.position)]).all():
            return objects, (float(bowl[0]), float(bowl[1]))
    raise ValueError(f"No room on the table for {names} and the bowl.")


def build_model(objects: list[TableObject], bowl: tuple[float, float] | None) -> mujoco.MjModel:
    """
    The robot, the table, the objects and a bowl.

    Args:
        objects (`list[TableObject]`): With a name each; no two alike.
        bowl (`tuple[float, float]`, *optional*): x and y of the bowl's centre.

    Raises:
        ValueError: If two objects have the same colour and shape, a colour or shape is unknown, or something lies
            where the arm does not reach.
    """
    for name, place in [*((item.name, item.position) for item in objects), *([("bowl", bowl)] if bowl else [])]:
        _check_reach(name, place)
    names = [item.name for item in objects]
    if len(set(names)) < len(names):
        raise ValueError(f"Two objects on the table are alike: {names}.")
    spec = mujoco.MjSpec.from_file(str(Path(__file__).with_name("panda.xml")))
    for item in objects:
        _add_object(spec, item)
    if bowl is not None:
        _add_bowl(spec, bowl)
    return spec.compile()


def _check_reach(name: str, place: tuple[float, float]) -> None:
    inside = (REACH_LOW[:2] <= place).all() and (place <= REACH_HIGH[:2]).all()
    if not (inside and np.hypot(*place) <= REACH_RADIUS):
        raise ValueError(
            f"The {name} at {place} is out of reach: x must be from {REACH_LOW[0]} to {REACH_HIGH[0]} m, y from "
            f"{REACH_LOW[1]} to {REACH_HIGH[1]} m, and the distance from the arm at most {REACH_RADIUS} m."
        )


def _add_object(spec: mujoco.MjSpec, item: TableObject) -> None:
    if item.color not in COLORS or item.shape not in SHAPES:
        raise ValueError(f"A {item.name} is unknown; colours: {sorted(COLORS)}, shapes: {sorted(SHAPES)}.")
    geometry, size = SHAPES[item.shape]
    body = spec.worldbody.add_body(
        name=item.name,
        pos=[*item.position, item.rest_height + 0.0005],
        quat=[np.cos(item.yaw / 2), 0.0, 0.0, np.sin(item.yaw / 2)],
    )
    body.add_freejoint(name=item.name)
    body.add_geom(
        name=item.name,
        type=geometry,
        size=size,
        mass=0.05,
        rgba=[*COLORS[item.color], 1.0],
        condim=6,
        # The last two resist spinning and rolling: a ball stays where it is put.
        friction=[1.0, 0.02, 0.002],
    )


def _add_bowl(spec: mujoco.MjSpec, position: tuple[float, float]) -> None:
    """A ring of slabs on a disc, fixed to the table."""
    body = spec.worldbody.add_body(name="bowl", pos=[*position, 0.0])
    rgba = [0.92, 0.92, 0.90, 1.0]
    body.add_geom(
        name="bowl_floor",
        type=mujoco.mjtGeom.mjGEOM_CYLINDER,
        size=[BOWL_RADIUS, 0.002, 0],
        pos=[0, 0, 0.002],
        rgba=rgba,
    )
    for index in range(_BOWL_WALLS):
        angle = 2 * np.pi * index / _BOWL_WALLS
        half_width = BOWL_RADIUS * np.tan(np.pi / _BOWL_WALLS) + 0.001
        body.add_geom(
            name=f"bowl_wall_{index}",
            type=mujoco.mjtGeom.mjGEOM_BOX,
            size=[0.003, half_width, BOWL_HEIGHT / 2],
            pos=[BOWL_RADIUS * np.cos(angle), BOWL_RADIUS * np.sin(angle), BOWL_HEIGHT / 2],
            quat=[np.cos(angle / 2), 0, 0, np.sin(angle / 2)],
            rgba=rgba,
        )


def randomize_appearance(model: mujoco.MjModel, rng: np.random.Generator) -> None:
    """Move and turn cameras and lamp a little, and change brightness and tint of everything, in place."""
    # The wrist camera is mounted on the hand, and shifts by millimetres.
    for name, shift, turn in (("front", 0.03, 0.03), ("wrist", 0.004, 0.02)):  # metres, radians
        camera = model.camera(name).id
        model.cam_pos[camera] += rng.uniform(-shift, shift, 3)
        _turn_camera(model, camera, rng.uniform(-turn, turn, 3))
    model.light_pos += rng.uniform(-0.4, 0.4, model.light_pos.shape)
    model.light_diffuse *= rng.uniform(0.8, 1.2)
    tint = rng.uniform(0.8, 1.15, (model.ngeom, 1)) * rng.uniform(0.93, 1.07, (model.ngeom, 3))
    model.geom_rgba[:, :3] = np.clip(model.geom_rgba[:, :3] * tint, 0.0, 1.0)
    table = model.geom("table").id
    model.geom_rgba[table, :3] = rng.uniform([0.45, 0.4, 0.3], [0.85, 0.75, 0.65])


def _turn_camera(model: mujoco.MjModel, camera: int, vector: np.ndarray) -> None:
    """By a rotation vector (3,) in radians, about the camera's own axes."""
    turn, turned = np.empty(4), np.empty(4)
    mujoco.mju_mat2Quat(turn, rotation_from_vector(vector).reshape(9))
    mujoco.mju_mulQuat(turned, model.cam_quat[camera], turn)
    model.cam_quat[camera] = turned
