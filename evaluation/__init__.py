"""Policies judged by what the robot does: closed-loop rollouts in any simulator, and open-loop comparisons."""
