"""Residual networks as explicit Runge-Kutta integrators over learned velocity fields."""
