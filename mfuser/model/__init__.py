"""The method: two encoders in lockstep, fused; class queries; a decoder."""
