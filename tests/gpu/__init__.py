"""What only a device can show. ``ZO_GPU_TESTS_ON=cpu`` runs whatever else makes sense on the CPU.

``test_bits`` kernels, ``test_runs`` whole runs against a CPU's replay of their journals,
``test_offloaded`` every tier and wire format against memory, ``test_races`` the same with windows
held open, ``test_sanitizer`` under compute-sanitizer, ``test_bytes`` the plan's bytes against the
allocator's, ``test_waits`` what is page-locked and that nobody waits for the device.
"""
