import java.io.File;
import java.io.IOException;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.net.Socket;
import java.net.UnknownHostException;
import java.util.Hashtable;
import javax.naming.directory.InitialDirContext;

/**
 * What Java programs do with names.
 *
 * Names call NAME PORT FILE: gets the page there again and again until FILE exists, each time from a new connection to
 * the address that the name leads to, as the JVM remembers it. Says address and page whenever they change.
 *
 * Names ask SERVER NAME: asks a name server for addresses, by the JVM's own resolver.
 */
public class Names {
    public static void main(String[] words) throws Exception {
        if (words[0].equals("ask")) {
            Hashtable<String, String> settings = new Hashtable<>();
            settings.put("java.naming.factory.initial", "com.sun.jndi.dns.DnsContextFactory");
            settings.put("java.naming.provider.url", "dns://" + words[1]);
            String[] types = {"A"};
            say(new InitialDirContext(settings).getAttributes(words[2], types).get("A").get(0).toString());
            return;
        }
        String said = "";
        File end = new File(words[3]);
        while (!end.exists()) {
            String found = call(words[1], Integer.parseInt(words[2]));
            if (!found.equals(said)) {
                say(found);
            }
            said = found;
            Thread.sleep(50);
        }
    }

    static String call(String name, int port) {
        try (Socket socket = new Socket()) {
            InetAddress address = InetAddress.getByName(name);
            socket.connect(new InetSocketAddress(address, port), 5000);
            socket.setSoTimeout(5000);
            socket.getOutputStream().write(("GET / HTTP/1.0\r\nHost: " + name + "\r\n\r\n").getBytes());
            String answer = new String(socket.getInputStream().readAllBytes());
            String page = answer.substring(answer.indexOf("\r\n\r\n") + 4).trim();
            return address.getHostAddress() + " " + page;
        } catch (UnknownHostException unknown) {
            return "unknown";
        } catch (IOException error) {
            return "failed: " + error;
        }
    }

    static void say(String line) {
        System.out.println(line);
        System.out.flush();
    }
}
