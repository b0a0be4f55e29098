"""Doctor: test on a checkpoint what capture and steering rely on."""
