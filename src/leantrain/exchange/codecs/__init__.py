"""From numbers to packets and back: signs, the largest entries, entropy-coded steps, plain floats."""
