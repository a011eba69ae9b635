def pytest_configure(config):
    """Register the marks on transformers' own tests."""
    tests = ["slow", "accelerate_tests", "torch_compile_test", "flash_attn_test"]
    for name in [*tests, "flash_attn_3_test", "flash_attn_4_test"]:
        config.addinivalue_line("markers", f"{name}: transformers'")
