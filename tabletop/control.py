"""From a pose of the hand to joint targets."""

import mujoco
import numpy as np


ARM_JOINTS = [f"joint{index}" for index in range(1, 8)]
HOME = np.array([0.0, 0.1, 0.0, -2.2, 0.0, 2.3, 0.785])
OPEN_WIDTH = 0.04  # of one finger, metres
# Box that the grasp point stays in, metres in the robot's base frame.
REACH_LOW = np.array([0.28, -0.42, 0.012])
REACH_HIGH = np.array([0.78, 0.42, 0.50])
REACH_RADIUS = 0.74  # about the arm's axis, metres: farther out it is stretched, and finds no way back
# How far the commanded pose may run ahead of the measured one; farther, an obstacle would be pressed ever harder.
MAX_LEAD = 0.05
# How close, in metres and radians alike, the joints must come to a pose to take it on, and how far they may turn for
# it in one action. A pose beyond that is not commanded: the arm would swing round to come as near as it can.
TOLERANCE = 0.02
MAX_JOINT_STEP = 1.0


def rotation_from_vector(vector: np.ndarray) -> np.ndarray:
    """Rotation matrix of a rotation vector (axis times angle in radians)."""
    angle = np.linalg.norm(vector)
    if angle < 1e-9:
        return np.eye(3)
    quaternion, matrix = np.empty(4), np.empty(9)
    mujoco.mju_axisAngle2Quat(quaternion, vector / angle, angle)
    mujoco.mju_quat2Mat(matrix, quaternion)
    return matrix.reshape(3, 3)


def vector_from_rotation(matrix: np.ndarray) -> np.ndarray:
    """Rotation vector of a rotation matrix."""
    quaternion, vector = np.empty(4), np.empty(3)
    mujoco.mju_mat2Quat(quaternion, np.ascontiguousarray(matrix).reshape(9))
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector


def rotation_from_rpy(angles: np.ndarray) -> np.ndarray:
    """Rotation matrix of roll, pitch and yaw about the fixed x, y and z axes, in radians."""
    roll, pitch, yaw = (rotation_from_vector(angle * axis) for angle, axis in zip(angles, np.eye(3), strict=True))
    return yaw @ pitch @ roll


class HandController:
    """
    Keeps a commanded pose of the grasp point and solves for the joints: damped least squares on a copy of the state.
    """

    def __init__(self, model: mujoco.MjModel):
        self.model = model
        self.scratch = mujoco.MjData(model)
        self.site = model.site("grasp").id
        self.limits = np.array([model.joint(name).range for name in ARM_JOINTS]).T  # (2, 7)

    def reset(self, data: mujoco.MjData) -> None:
        self.joints = data.qpos[:7].copy()
        self.position = data.site_xpos[self.site].copy()
        self.rotation = data.site_xmat[self.site].reshape(3, 3).copy()

    def move(self, data: mujoco.MjData, translation: np.ndarray, rotation: np.ndarray, opening: float) -> None:
        """
        Advance the commanded pose and write the actuators' targets. Where the joints cannot follow both, the hand is
        moved and not turned, or stays.

        Args:
            data (`mujoco.MjData`): State; only its controls change.
            translation (`np.ndarray`): (3,), metres in the base frame.
            rotation (`np.ndarray`): (3,), roll, pitch, yaw in radians about the base frame's axes.
            opening (`float`): 1 open, 0 closed.
        """
        measured = data.site_xpos[self.site]
        lead = np.clip(self.position + translation - measured, -MAX_LEAD, MAX_LEAD)
        position = np.clip(measured + lead, REACH_LOW, REACH_HIGH)
        position[:2] *= min(1.0, REACH_RADIUS / np.hypot(*position[:2]))
        self._take_on(data, position, rotation_from_rpy(rotation) @ self.rotation)
        data.ctrl[:7] = self.joints
        data.ctrl[7] = opening * OPEN_WIDTH

    def _take_on(self, data: mujoco.MjData, position: np.ndarray, rotation: np.ndarray) -> None:
        """Command a pose, or its position alone, or nothing new."""
        # From a stretched arm, no small turn of any joint leads back: one that is bent towards home finds the way.
        bent = self.joints + 0.3 * (HOME - self.joints)
        for turned, start in ((rotation, self.joints), (self.rotation, self.joints), (self.rotation, bent)):
            if (joints := self._solve(data, position, turned, start)) is not None:
                self.joints, self.position, self.rotation = joints, position, turned
                return

    def _solve(
        self, data: mujoco.MjData, position: np.ndarray, rotation: np.ndarray, start: np.ndarray, iterations: int = 10
    ) -> np.ndarray | None:
        """Joints (7,) for a pose, searched from a start (7,); None if there are none near the commanded ones."""
        scratch, model = self.scratch, self.model
        scratch.qpos[:] = data.qpos
        scratch.qpos[:7] = start
        jacobian = np.zeros((6, model.nv))
        for _ in range(iterations):
            mujoco.mj_kinematics(model, scratch)
            mujoco.mj_comPos(model, scratch)
            mujoco.mj_jacSite(model, scratch, jacobian[:3], jacobian[3:], self.site)
            turned = scratch.site_xmat[self.site].reshape(3, 3)
            error = np.concatenate(
                [position - scratch.site_xpos[self.site], vector_from_rotation(rotation @ turned.T)]
            )
            if np.linalg.norm(error) < 1e-4:
                break
            arm = jacobian[:, :7]
            joints = scratch.qpos[:7] + _damped_step(arm, error)
            blocked = (joints < self.limits[0]) | (joints > self.limits[1])
            if blocked.any():
                # The others do what these cannot; merely clipped, a stretched arm would stay as it is.
                joints = scratch.qpos[:7] + _damped_step(np.where(blocked, 0.0, arm), error)
            scratch.qpos[:7] = np.clip(joints, *self.limits)
        joints = scratch.qpos[:7].copy()
        is_near = np.linalg.norm(error) < TOLERANCE and np.abs(joints - self.joints).max() < MAX_JOINT_STEP
        return joints if is_near else None


def _damped_step(jacobian: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Change of the joints (7,) that takes away an error (6,), short where the jacobian (6, 7) is singular."""
    return jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + 1e-4 * np.eye(6), error)
