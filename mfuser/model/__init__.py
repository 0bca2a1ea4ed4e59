"""The method. In reading order: dgss (images in, class scores out), encoder (two encoders in
lockstep, fused), pyramid, alignment; then sliding_window and assembly."""
