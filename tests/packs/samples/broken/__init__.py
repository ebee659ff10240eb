"""A pack that needs a package nobody has."""

import a_package_that_nobody_has

NODE_CLASS_MAPPINGS = {"SampleBroken": a_package_that_nobody_has.Node}
