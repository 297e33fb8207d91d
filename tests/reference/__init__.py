"""Every rule for one flat float64 vector: slow, short, and the definition that the tests compare with."""
