/* Prints the addresses of a name, as its C library finds them: resolve NAME */

#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <sys/socket.h>

int main(int count, char **words)
{
	struct addrinfo hints = { .ai_socktype = SOCK_STREAM };
	struct addrinfo *found;
	char text[INET6_ADDRSTRLEN];

	int error = getaddrinfo(words[count - 1], "80", &hints, &found);
	if (error) {
		fprintf(stderr, "%s\n", gai_strerror(error));
		return 1;
	}
	for (; found; found = found->ai_next) {
		const void *address = found->ai_family == AF_INET
			? (void *)&((struct sockaddr_in *)found->ai_addr)->sin_addr
			: (void *)&((struct sockaddr_in6 *)found->ai_addr)->sin6_addr;
		puts(inet_ntop(found->ai_family, address, text, sizeof text));
	}
	return 0;
}
