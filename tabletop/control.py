"""From a pose of the hand to joint targets."""

import mujoco
import numpy as np


ARM_JOINTS = [f"joint{index}" for index in range(1, 8)]
HOME = np.array([0.0, 0.1, 0.0, -2.2, 0.0, 2.3, 0.785])
OPEN_WIDTH = 0.04  # of one finger, metres
# Box that the grasp point stays in, metres in the robot's base frame.
REACH_LOW = np.array([0.28, -0.42, 0.012])
REACH_HIGH = np.array([0.78, 0.42, 0.50])
# How far the commanded pose may run ahead of the measured one; farther, an obstacle would be pressed ever harder.
MAX_LEAD = 0.05


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
        Advance the commanded pose and write the actuators' targets.

        Args:
            data (`mujoco.MjData`): State; only its controls change.
            translation (`np.ndarray`): (3,), metres in the base frame.
            rotation (`np.ndarray`): (3,), roll, pitch, yaw in radians about the base frame's axes.
            opening (`float`): 1 open, 0 closed.
        """
        measured = data.site_xpos[self.site]
        lead = np.clip(self.position + translation - measured, -MAX_LEAD, MAX_LEAD)
        self.position = np.clip(measured + lead, REACH_LOW, REACH_HIGH)
        self.rotation = rotation_from_rpy(rotation) @ self.rotation
        self._solve(data)
        data.ctrl[:7] = self.joints
        data.ctrl[7] = opening * OPEN_WIDTH

    def _solve(self, data: mujoco.MjData, iterations: int = 10) -> None:
        scratch, model = self.scratch, self.model
        scratch.qpos[:] = data.qpos
        scratch.qpos[:7] = self.joints
        jacobian = np.zeros((6, model.nv))
        for _ in range(iterations):
            mujoco.mj_kinematics(model, scratch)
            mujoco.mj_comPos(model, scratch)
            mujoco.mj_jacSite(model, scratch, jacobian[:3], jacobian[3:], self.site)
            turned = scratch.site_xmat[self.site].reshape(3, 3)
            error = np.concatenate(
                [self.position - scratch.site_xpos[self.site], vector_from_rotation(self.rotation @ turned.T)]
            )
            if np.linalg.norm(error) < 1e-4:
                break
            arm = jacobian[:, :7]
            step = arm.T @ np.linalg.solve(arm @ arm.T + 1e-4 * np.eye(6), error)
            scratch.qpos[:7] = np.clip(scratch.qpos[:7] + step, *self.limits)
        self.joints = scratch.qpos[:7].copy()
