"""What quart_chat uses of other libraries beyond their public interface, one file per library."""
