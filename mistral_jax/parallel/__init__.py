"""Layouts and meshes over devices, and several processes as one program."""
