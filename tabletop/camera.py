"""Pictures of the scene: a ray caster that needs no graphics library, or MuJoCo's OpenGL renderer."""

import itertools
import os
from typing import Protocol

import mujoco
import numpy as np

from . import GRAPHICS_PACKAGES


BACKENDS = ("raycast", "osmesa", "egl")

_SKY = np.array([0.78, 0.86, 0.93])
# Collision and visual geometry of the scene are in group 0; nothing else is drawn.
_GROUPS = np.array([1, 0, 0, 0, 0, 0], dtype=np.uint8)
_CORNERS = np.array(list(itertools.product((-1.0, 1.0), repeat=3)))  # of a cube
# The grid in which the lamp sees the solids: half its side at distance 1, and cells along a side.
_LAMP_EXTENT, _LAMP_CELLS = 0.6, 256


class Camera(Protocol):
    """What both renderers offer."""

    def render(self, data: mujoco.MjData, camera: str) -> np.ndarray:
        """uint8 (S, S, 3) of one camera."""

    def close(self) -> None:
        """Release what the renderer holds."""


def make_camera(model: mujoco.MjModel, size: int, backend: str = "raycast") -> Camera:
    """
    A renderer for square pictures.

    Args:
        model (`mujoco.MjModel`): The scene.
        size (`int`): Side of the picture in pixels.
        backend (`str`, defaults to `"raycast"`): `raycast` (numpy and MuJoCo's rays, runs everywhere), `osmesa` or
            `egl` (MuJoCo's renderer, needs the library).

    Raises:
        ValueError: If the backend is unknown.
        RuntimeError: If its library is missing; says what to install.
    """
    check_backend(backend)
    return RaycastCamera(model, size) if backend == "raycast" else OpenGLCamera(model, size, backend)


def check_backend(backend: str) -> None:
    """
    Find out before a scene is built whether it could be rendered.

    Raises:
        ValueError: If the backend is unknown.
        RuntimeError: If MuJoCo was imported for another graphics library; says what to do.
    """
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {BACKENDS}, got {backend!r}.")
    if backend != "raycast" and os.environ.get("MUJOCO_GL") != backend:
        raise RuntimeError(
            f"Start Python with MUJOCO_GL={backend} for this renderer: MuJoCo chooses its graphics library when it is "
            f"imported. On Debian it comes with: apt-get install {GRAPHICS_PACKAGES[backend]}."
        )


class RaycastCamera:
    """
    One ray per pixel, Lambert shading from the scene's lamp, hard shadows.

    Geometry is primitive throughout, which is what MuJoCo intersects fast and exactly. It is asked only where it has
    to be: a ray that passes by the boxes around all solids meets the top of the table or the floor, and light that
    passes them by arrives.
    """

    def __init__(self, model: mujoco.MjModel, size: int):
        self.model = model
        self.size = size
        self.colors = np.vstack([model.geom_rgba[:, :3], _SKY]).astype(np.float32)  # the last row: nothing was hit
        self.light = model.light_pos[0].copy()
        # The model's lights are white: one channel tells their strength.
        headlight = model.vis.headlight
        self.ambient, self.headlight = float(headlight.ambient[0]), float(headlight.diffuse[0])
        self.lamp = float(model.light_diffuse[0, 0])
        self.directions: dict[str, np.ndarray] = {}
        self.floor, self.table = model.geom("floor").id, model.geom("table").id
        is_solid = np.ones(model.ngeom, dtype=bool)
        is_solid[[self.floor, self.table]] = False
        self.solids = np.append(np.flatnonzero(is_solid), self.table)  # the table last
        centres, halves = np.split(model.geom_aabb[self.solids], 2, axis=1)
        self.corners = centres + halves * _CORNERS[:, None]  # (8, G, 3), in the frame of each geometry

    def render(self, data: mujoco.MjData, camera: str) -> np.ndarray:
        return self.render_with_geoms(data, camera)[0]

    def render_with_geoms(self, data: mujoco.MjData, camera: str) -> tuple[np.ndarray, np.ndarray]:
        """The picture, uint8 (S, S, 3), and the number of the geometry on each pixel, (S, S); -1 is the sky."""
        identity = self.model.camera(camera).id
        origin = data.cam_xpos[identity]
        axes = data.cam_xmat[identity].reshape(3, 3)  # the camera looks along its third axis, backwards
        rays = np.einsum("nj,ij->ni", self._directions(camera), axes)  # (S * S, 3)
        edges = (np.arange(self.size + 1) - self.size / 2) / self._focal(camera)
        near = [cells.reshape(-1) for cells in self._near_boxes(data, origin, axes, edges)]
        geoms, distances, normals = self._first_hits(data, origin, rays, *near)
        brightness = self.ambient + self.headlight * np.maximum(np.einsum("ni,i->n", normals, axes[:, 2]), 0.0)
        brightness += self.lamp * self._lamplight(data, origin + rays * distances[:, None], normals)
        brightness[geoms < 0] = 1.0
        colors = self.colors[geoms]
        colors *= brightness.astype(np.float32)[:, None]
        np.minimum(colors, 1.0, out=colors)
        picture = np.uint8(colors * 255 + 0.5).reshape(self.size, self.size, 3)
        return picture, geoms.reshape(self.size, self.size)

    def close(self) -> None:
        self.directions.clear()

    def _first_hits(
        self, data: mujoco.MjData, origin: np.ndarray, rays: np.ndarray, near_solid: np.ndarray, near_table: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What each ray meets, as `_cast` says it; `near_...` (N,) tell which may meet a solid or the table."""
        table, floor = ((self.model.geom_pos[geom], self.model.geom_size[geom]) for geom in (self.table, self.floor))
        level = np.where(near_table, self._table_top, floor[0][2])
        distances = (level - origin[2]) / np.where(rays[:, 2] < 0, rays[:, 2], np.nan)
        beside = np.zeros(len(rays), dtype=bool)
        for axis in (0, 1):
            spots = origin[axis] + rays[:, axis] * distances
            for near, (place, half) in ((near_table, table), (~near_table, floor)):
                beside |= near & (np.abs(spots - place[axis]) > half[axis])
        asked = np.flatnonzero(near_solid | beside | ~(distances > 0))
        geoms = np.where(near_table, self.table, self.floor)
        normals = np.zeros_like(rays)
        normals[:, 2] = 1.0
        geoms[asked], distances[asked], normals[asked] = self._cast(data, origin, rays[asked])
        return geoms, distances, normals

    def _lamplight(self, data: mujoco.MjData, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
        """How much of the lamp's light surface points (N, 3) with their normals reflect, (N,); none in shadow."""
        rays = points - self.light
        reach = np.sqrt(np.einsum("ni,ni->n", rays, rays))
        diffuse = np.maximum(np.einsum("ni,ni->n", normals, rays) / -reach, 0.0)
        asked = np.flatnonzero((diffuse > 0) & self._may_be_in_shadow(data, points, rays))
        # From the lamp, so that all rays share one origin: a point is lit where nothing lies nearer.
        reach = reach[asked]
        _, distances, _ = self._cast(data, self.light, rays[asked] / reach[:, None])
        diffuse[asked[(distances >= 0) & (distances < reach - 3e-3)]] = 0.0
        return diffuse

    def _may_be_in_shadow(self, data: mujoco.MjData, points: np.ndarray, rays: np.ndarray) -> np.ndarray:
        """Whether (N,) a solid, or for points (N, 3) below its top the table, may be in the way of the lamp's rays."""
        edges = np.linspace(-_LAMP_EXTENT, _LAMP_EXTENT, _LAMP_CELLS + 1)
        near_solid, near_table = self._near_boxes(data, self.light, np.eye(3), edges)
        scale = 0.5 * _LAMP_CELLS / _LAMP_EXTENT / np.minimum(rays[:, 2], -1e-3)
        columns = 0.5 * _LAMP_CELLS - rays[:, 0] * scale
        rows = 0.5 * _LAMP_CELLS + rays[:, 1] * scale
        seen = (np.minimum(columns, rows) >= 0) & (np.maximum(columns, rows) < _LAMP_CELLS)
        cells = np.where(seen, rows, 0.0).astype(np.intp) * _LAMP_CELLS + np.where(seen, columns, 0.0).astype(np.intp)
        near = near_solid.take(cells) | (near_table.take(cells) & (points[:, 2] < self._table_top - 1e-6))
        return near | ~seen

    def _near_boxes(
        self, data: mujoco.MjData, origin: np.ndarray, axes: np.ndarray, edges: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """
        Cells of a picture in which the box around a solid, or the table, may be seen.

        Args:
            data (`mujoco.MjData`): The state.
            origin (`np.ndarray`): (3,), where the picture is seen from.
            axes (`np.ndarray`): (3, 3), its columns right, up and backwards.
            edges (`np.ndarray`): (C + 1,), between the cells, to the right and down alike, at distance 1; ascending.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: bool (C, C) each, rows first: any solid, the table.
        """
        turns = data.geom_xmat[self.solids].reshape(-1, 3, 3)
        corners = np.einsum("gij,kgj->kgi", turns, self.corners) + (data.geom_xpos[self.solids] - origin)
        right, up, back = np.moveaxis(corners @ axes, -1, 0)  # (8, G) each
        depth, across = -back, np.stack([-up, right])
        # A box is convex: it lies where its corners lie.
        beyond = edges[-1] * depth
        outside = ((across > beyond).all(axis=1) | (across < -beyond).all(axis=1)).any(axis=0)
        inside = ~outside & (depth > 0).any(axis=0)
        seen = across / np.where(depth > 0, depth, np.nan)
        # One that reaches behind the origin may be seen anywhere.
        first = np.searchsorted(edges, np.nan_to_num(seen.min(axis=1), nan=-np.inf)) - 1
        last = np.searchsorted(edges, np.nan_to_num(seen.max(axis=1), nan=np.inf), side="right")
        spans = np.concatenate([np.maximum(first, 0), last]).T  # (G, 4): top, left, bottom, right
        near_solid, near_table = np.zeros((2, len(edges) - 1, len(edges) - 1), dtype=bool)
        for near, boxes in ((near_solid, np.s_[:-1]), (near_table, np.s_[-1:])):
            for top, left, bottom, right in spans[boxes][inside[boxes]].tolist():
                near[top:bottom, left:right] = True
        return near_solid, near_table

    def _cast(
        self, data: mujoco.MjData, origin: np.ndarray, rays: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Geometry (-1: none), distance and normal at the first hit of each ray (N, 3) from one origin."""
        count = len(rays)
        geoms, distances, normals = (
            np.empty((count, 1), dtype=np.int32),
            np.empty((count, 1)),
            np.zeros((3 * count, 1)),
        )
        start = np.array(origin).reshape(3, 1)
        flat = rays.reshape(-1, 1)
        mujoco.mj_multiRay(self.model, data, start, flat, _GROUPS, True, -1, geoms, distances, normals, count, 100.0)
        return geoms[:, 0], distances[:, 0], normals.reshape(-1, 3)

    @property
    def _table_top(self) -> float:
        return self.model.geom_pos[self.table, 2] + self.model.geom_size[self.table, 2]

    def _focal(self, camera: str) -> float:
        """Distance, in pixels, at which one pixel of the picture is one wide."""
        return 0.5 * self.size / np.tan(np.deg2rad(self.model.camera(camera).fovy[0]) / 2)

    def _directions(self, camera: str) -> np.ndarray:
        """Unit vectors through the pixels' centres in the camera's frame, (S * S, 3)."""
        if camera not in self.directions:
            across = (np.arange(self.size) + 0.5 - self.size / 2) / self._focal(camera)
            u, v = np.meshgrid(across, -across)
            vectors = np.stack([u, v, np.full_like(u, -1.0)], axis=-1).reshape(-1, 3)
            self.directions[camera] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return self.directions[camera]


class OpenGLCamera:
    """MuJoCo's own renderer, with a library that needs no display."""

    def __init__(self, model: mujoco.MjModel, size: int, backend: str):
        try:
            self.renderer = mujoco.Renderer(model, height=size, width=size)
        except Exception as error:
            raise RuntimeError(
                f"The renderer {backend!r} cannot start ({error}). On Debian: apt-get install "
                f"{GRAPHICS_PACKAGES[backend]}; or use the default, 'raycast', which needs no library."
            ) from error

    def render(self, data: mujoco.MjData, camera: str) -> np.ndarray:
        self.renderer.update_scene(data, camera=camera)
        return self.renderer.render().copy()

    def close(self) -> None:
        self.renderer.close()
