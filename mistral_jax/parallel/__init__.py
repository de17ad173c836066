"""Layouts over devices, meshes, and several processes as one program."""
