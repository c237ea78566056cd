"""Pictures of the scene: a ray caster that needs no graphics library, or MuJoCo's OpenGL renderer."""

import os
from typing import Protocol

import mujoco
import numpy as np


BACKENDS = ("raycast", "osmesa", "egl")

_SKY = np.array([0.78, 0.86, 0.93])
# As the lights of panda.xml have it, so that all renderers agree.
_AMBIENT, _HEADLIGHT, _LAMP = 0.4, 0.2, 0.5
# Collision and visual geometry of the scene are in group 0; nothing else is drawn.
_GROUPS = np.array([1, 0, 0, 0, 0, 0], dtype=np.uint8)


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
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {BACKENDS}, got {backend!r}.")
    if backend == "raycast":
        return RaycastCamera(model, size)
    return OpenGLCamera(model, size, backend)


class RaycastCamera:
    """
    One ray per pixel, Lambert shading from the scene's lamp, hard shadows.

    Geometry is primitive throughout, which is what MuJoCo intersects fast and exactly.
    """

    def __init__(self, model: mujoco.MjModel, size: int):
        self.model = model
        self.size = size
        self.colors = np.vstack([model.geom_rgba[:, :3], _SKY]).astype(np.float32)  # the last row: nothing was hit
        self.light = model.light_pos[0].copy()
        self.directions: dict[str, np.ndarray] = {}

    def render(self, data: mujoco.MjData, camera: str) -> np.ndarray:
        identity = self.model.camera(camera).id
        origin = data.cam_xpos[identity]
        axes = data.cam_xmat[identity].reshape(3, 3)  # the camera looks along its third axis, backwards
        rays = self._directions(camera) @ axes.T  # (S * S, 3)
        geoms, distances, normals = self._cast(data, origin, rays, with_normals=True)
        hit = geoms >= 0
        brightness = np.ones(len(rays), dtype=np.float32)
        facing = np.clip(normals[hit] @ axes[:, 2], 0.0, 1.0)
        lit = self._lamp(data, origin + rays[hit] * distances[hit, None], normals[hit])
        brightness[hit] = _AMBIENT + _HEADLIGHT * facing + _LAMP * lit
        colors = np.where(hit[:, None], self.colors[geoms] * brightness[:, None], self.colors[-1])
        return np.uint8(np.clip(colors, 0.0, 1.0) * 255 + 0.5).reshape(self.size, self.size, 3)

    def close(self) -> None:
        self.directions.clear()

    def _lamp(self, data: mujoco.MjData, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
        """How much of the lamp's light surface points (N, 3) with their normals reflect, (N,); none in shadow."""
        to_light = self.light - points
        reach = np.linalg.norm(to_light, axis=1)
        to_light /= reach[:, None]
        diffuse = np.clip((normals * to_light).sum(axis=1), 0.0, 1.0)
        # From the lamp, so that all rays share one origin: a point is lit where nothing lies nearer.
        _, distances, _ = self._cast(data, self.light, -to_light, with_normals=False)
        blocked = (distances >= 0) & (distances < reach - 3e-3)
        return np.where(blocked, 0.0, diffuse)

    def _cast(
        self, data: mujoco.MjData, origin: np.ndarray, rays: np.ndarray, with_normals: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Geometry (-1: none), distance and normal at the first hit of each ray from one origin."""
        count = len(rays)
        geoms = np.empty((count, 1), dtype=np.int32)
        distances = np.empty((count, 1))
        normals = np.empty((3 * count, 1)) if with_normals else None
        flat = np.ascontiguousarray(rays, dtype=np.float64).reshape(-1, 1)
        start = np.asarray(origin, dtype=np.float64).reshape(3, 1)
        mujoco.mj_multiRay(self.model, data, start, flat, _GROUPS, True, -1, geoms, distances, normals, count, 100.0)
        return geoms[:, 0], distances[:, 0], None if normals is None else normals.reshape(-1, 3)

    def _directions(self, camera: str) -> np.ndarray:
        """Unit vectors through the pixels' centres in the camera's frame, (S * S, 3)."""
        if camera not in self.directions:
            focal = 0.5 * self.size / np.tan(np.deg2rad(self.model.camera(camera).fovy[0]) / 2)
            across = np.arange(self.size) + 0.5 - self.size / 2
            u, v = np.meshgrid(across / focal, -across / focal)
            vectors = np.stack([u, v, np.full_like(u, -1.0)], axis=-1).reshape(-1, 3)
            self.directions[camera] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return self.directions[camera]


class OpenGLCamera:
    """MuJoCo's own renderer, with a library that needs no display."""

    def __init__(self, model: mujoco.MjModel, size: int, backend: str):
        packages = {"osmesa": "libosmesa6", "egl": "libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri"}[backend]
        if os.environ.get("MUJOCO_GL") != backend:
            raise RuntimeError(
                f"Start Python with MUJOCO_GL={backend} for this renderer: MuJoCo chooses its graphics library when "
                f"it is imported. On Debian it comes with: apt-get install {packages}."
            )
        try:
            self.renderer = mujoco.Renderer(model, height=size, width=size)
        except Exception as error:
            raise RuntimeError(
                f"The renderer {backend!r} cannot start ({error}). On Debian: apt-get install {packages}; or use the "
                "default, 'raycast', which needs no library."
            ) from error

    def render(self, data: mujoco.MjData, camera: str) -> np.ndarray:
        self.renderer.update_scene(data, camera=camera)
        return self.renderer.render().copy()

    def close(self) -> None:
        self.renderer.close()
