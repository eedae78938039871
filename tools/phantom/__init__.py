"""A seeded chest-CT phantom: anatomy, vessels, nodules, noise, and the DICOM files that a scanner would export."""
